"""One run of a recipe: its options, its data, model, optimizer and engine, its folder and its end."""
