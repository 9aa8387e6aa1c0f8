"""sfumato.privacy.gradients"""
