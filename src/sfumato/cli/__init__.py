"""sfumato.cli"""
