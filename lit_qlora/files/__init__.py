"""Files: read within limits, written whole or not at all, hashed; and caches that stay small."""
