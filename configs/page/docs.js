// Swagger UI draws this network's own OpenAPI document; it asks no other host.

SwaggerUIBundle({
  dom_id: "#operations",
  url: "/openapi.json",
  validatorUrl: null,
  deepLinking: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
});
