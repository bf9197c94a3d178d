"""Published machine-learning methods as parts that run, each with evidence."""

__version__ = "0.1.0"
