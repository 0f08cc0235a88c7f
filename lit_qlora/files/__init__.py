"""Files and folders that are whole or absent, and caches that stay small."""
