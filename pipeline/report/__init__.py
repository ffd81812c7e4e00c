"""Show jobs side by side: read their folders, and write a page, a summary for pull requests, and plots."""
