"""sfumato.models"""
