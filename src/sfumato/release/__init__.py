"""sfumato.release"""
