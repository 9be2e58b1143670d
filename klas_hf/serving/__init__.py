"""A language supernet by the OpenAI protocol, on the server of transformers: each request on the path it pays for."""
