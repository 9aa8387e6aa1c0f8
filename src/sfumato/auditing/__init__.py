"""sfumato.auditing"""
