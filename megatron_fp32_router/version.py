"""The plugin's version, in a file of its own so that the build can read it without importing (and arming) anything."""

__version__ = "0.1.0"
