"""sfumato.data"""
