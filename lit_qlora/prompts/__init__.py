"""From a conversation to token ids: tokenizers, prompt styles and chat templates."""
