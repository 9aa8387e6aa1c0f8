"""sfumato.evaluation"""
