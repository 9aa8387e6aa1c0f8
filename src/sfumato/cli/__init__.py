"""The command line: one thin file per verb. A verb parses, calls the library, and returns an ``Answer``."""
