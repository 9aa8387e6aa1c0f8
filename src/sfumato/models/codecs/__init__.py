"""sfumato.models.codecs"""
