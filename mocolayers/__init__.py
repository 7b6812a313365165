"""mocolayers: momentum contrast with intermediate-layer losses, for medical images and few labels."""
