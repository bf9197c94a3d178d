"""Your data: load it, profile it, try the parts that claim to help, and confirm one of them on locked rows."""
