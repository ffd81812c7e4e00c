"""See it: jobs side by side. Reads job folders; writes a page, a summary for pull requests, and plots."""
