"""Chat: conversations and their template, serving, asking an endpoint of OpenAI's API, distilling, scoring."""
