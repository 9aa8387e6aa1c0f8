"""sfumato.models.objectives"""
