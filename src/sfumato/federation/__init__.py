"""sfumato.federation"""
