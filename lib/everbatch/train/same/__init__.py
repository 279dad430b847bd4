"""SAME: experts with a router in frozen layers, and what keeps both right for earlier tasks."""
