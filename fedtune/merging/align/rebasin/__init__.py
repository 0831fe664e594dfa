"""Re-basin and its helpers."""
