"""Write one page with pictures about one run, or several side by side."""
