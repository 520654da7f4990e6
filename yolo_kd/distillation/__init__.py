"""Teacher, student and recipe together make one step. Usable without a trainer."""
