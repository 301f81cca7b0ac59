"""What a model writes: from a prompt, in a chat, for a file of prompts; the verb `generate`."""
