"""The catalogue and the comparison as web pages: `lossary serve`, `lossary build-site`, `lossary digest`."""
