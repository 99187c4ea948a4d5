//! The API server: request pipeline, snapshot cache, watch, discovery, OpenAPI, authentication, authorization, admission.
