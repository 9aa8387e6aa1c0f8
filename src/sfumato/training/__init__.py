"""sfumato.training"""
