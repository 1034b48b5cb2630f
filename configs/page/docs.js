// Swagger UI shows the OpenAPI document of this network; it sends requests to no other host.

SwaggerUIBundle({
  dom_id: "#operations",
  url: "/openapi.json",
  validatorUrl: null,
  deepLinking: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
});
