"""What a person reads: tables, pictures and W&B."""
