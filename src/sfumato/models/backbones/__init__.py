"""sfumato.models.backbones: tensors to tensors."""
