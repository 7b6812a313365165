"""The method alone: encoder, losses, momentum contrast. Imports torch and torchvision only."""
