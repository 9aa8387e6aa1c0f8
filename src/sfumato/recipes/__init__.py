"""sfumato.recipes"""
