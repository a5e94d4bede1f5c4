"""What a person sees: a bar while it runs, tables and lines at the end, log lines beside both; always made harmless."""
