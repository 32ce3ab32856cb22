"""Run configuration: schema, validation, parsing. No torch is imported."""
