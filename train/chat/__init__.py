"""Chat: asking an endpoint that speaks OpenAI's API, distilling from it, talking to it, scoring its answers."""
