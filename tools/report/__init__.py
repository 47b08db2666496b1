"""Write one page with figures about one run, or about several side by side."""
