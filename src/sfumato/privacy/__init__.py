"""sfumato.privacy"""
