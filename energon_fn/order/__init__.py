"""The order: which sample when, decided on keys, before anything is read."""
