"""Jobs from acceptance to storage."""
