"""What keeps old tasks in weight space: quadratic penalties, importance, refresh learning."""
