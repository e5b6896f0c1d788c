#include "runtime/json_schema.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "formats/gguf.h"
#include "formats/test_files.h"
#include "formats/tokenizer.h"
#include "runtime/sampler.h"

namespace latte::runtime {
namespace {

using formats::error_text;
using nlohmann::json;

// Tokens of one character each, and an end.
formats::Tokenizer letters() {
  formats::GgufMetadata metadata("letters.gguf");
  std::vector<std::string> tokens = {"<|end|>"};
  for (char letter = '!'; letter <= '~'; ++letter) tokens.emplace_back(1, letter);
  tokens.emplace_back("\u0120");
  tokens.emplace_back("\u010A");
  tokens.emplace_back("ab");
  std::vector<int32_t> types(tokens.size(), 1);
  types[0] = 3;
  metadata.set("tokenizer.ggml.model", std::string("gpt2"));
  metadata.set("tokenizer.ggml.pre", std::string("gpt-2"));
  metadata.set("tokenizer.ggml.tokens", formats::GgufArray(tokens));
  metadata.set("tokenizer.ggml.token_type", formats::GgufArray(types));
  metadata.set("tokenizer.ggml.merges", formats::GgufArray(std::vector<std::string>{"a b"}));
  metadata.set("tokenizer.ggml.eos_token_id", uint32_t{0});
  return formats::Tokenizer(metadata);
}

// What random logits write under a schema; closing marks are likelier, so that texts end.
std::string written(const formats::Tokenizer& tokenizer, const std::string& schema, uint32_t seed) {
  SamplingOptions options;
  options.temperature = 1.0;
  options.top_k = 0;
  options.top_p = 1.0;
  options.min_p = 0.0;
  options.seed = seed;
  options.grammar = grammar_of_schema(schema);
  Sampler sampler(tokenizer.size(), &tokenizer, options);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 1.5f);
  std::string text;
  std::vector<float> logits(static_cast<size_t>(tokenizer.size()));
  for (int i = 0; i < 3000; ++i) {
    for (size_t t = 0; t < logits.size(); ++t) {
      logits[t] = normal(random);
      const std::string piece = tokenizer.piece(static_cast<int64_t>(t));
      if (t == 0 || piece == "\"" || piece == "}" || piece == "]") logits[t] += 6.0f;
      if (piece == "{" || piece == "[") logits[t] -= 2.0f;
    }
    const int32_t token = sampler.choose(logits);
    if (tokenizer.ends_generation(token)) return text;
    text += tokenizer.piece(token);
  }
  ADD_FAILURE() << "no end: " << text.substr(0, 200);
  return text;
}

struct Case {
  const char* schema;
  std::function<bool(const json&)> accepts;
};

TEST(JsonSchema, WhatIsWrittenKeepsToIt) {
  const std::vector<Case> cases = {
      {"true", [](const json&) { return true; }},
      {"{}", [](const json&) { return true; }},
      {R"({"type": "string"})", [](const json& v) { return v.is_string(); }},
      {R"({"type": "string", "minLength": 2, "maxLength": 5})",
       [](const json& v) { return v.is_string() && v.dump().size() >= 4 && v.get<std::string>().size() <= 20; }},
      {R"({"type": "integer"})", [](const json& v) { return v.is_number_integer(); }},
      {R"({"type": "integer", "minimum": 1})", [](const json& v) { return v.is_number_integer() && v >= 1; }},
      {R"({"type": "number"})", [](const json& v) { return v.is_number(); }},
      {R"({"type": ["boolean", "null"]})", [](const json& v) { return v.is_boolean() || v.is_null(); }},
      {R"({"enum": ["a\"b", 3, null, {"x": [1]}]})",
       [](const json& v) {
         return v == "a\"b" || v == 3 || v.is_null() || v == json{{"x", {1}}};
       }},
      {R"({"const": "back\\slash"})", [](const json& v) { return v == "back\\slash"; }},
      {R"({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4})",
       [](const json& v) {
         return v.is_array() && v.size() >= 2 && v.size() <= 4 &&
                std::all_of(v.begin(), v.end(), [](auto& i) { return i.is_boolean(); });
       }},
      {R"({"type": "array", "items": {"type": "null"}})", [](const json& v) { return v.is_array(); }},
      {R"({"type": "array", "maxItems": 0})", [](const json& v) { return v.is_array() && v.empty(); }},
      {R"({"type": "array", "prefixItems": [{"const": 1}, {"type": "string"}], "items": {"type": "boolean"}, "minItems": 3})",
       [](const json& v) { return v.size() >= 3 && v[0] == 1 && v[1].is_string() && v[2].is_boolean(); }},
      {R"({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0},
           "tags": {"type": "array", "items": {"enum": ["x", "y"]}}, "note": {"type": "null"}}, "required": ["age"],
           "additionalProperties": false})",
       [](const json& v) {
         if (!v.is_object() || !v.contains("age") || v["age"] < 0) return false;
         for (const auto& [key, value] : v.items()) {
           if (key != "name" && key != "age" && key != "tags" && key != "note") return false;
         }
         return !v.contains("name") || v["name"].is_string();
       }},
      {R"({"properties": {"a": {"type": "null"}, "b": {"type": "null"}}})", [](const json& v) { return v.is_object(); }},
      {R"({"type": "object", "additionalProperties": {"type": "integer"}})",
       [](const json& v) { return std::all_of(v.begin(), v.end(), [](auto& i) { return i.is_number_integer(); }); }},
      {R"({"anyOf": [{"type": "null"}, {"type": "object", "properties": {"k": {"const": 1}}, "required": ["k"]}]})",
       [](const json& v) { return v.is_null() || v["k"] == 1; }},
      {R"({"allOf": [{"$ref": "#/$defs/flag"}], "$defs": {"flag": {"type": "boolean", "title": "a flag"}}})",
       [](const json& v) { return v.is_boolean(); }},
      // A tree, which contains itself.
      {R"({"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"value": {"type": "boolean"},
           "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1}}, "required": ["value"]}}})",
       [](const json& v) { return v["value"].is_boolean() && (!v.contains("children") || v["children"].size() <= 1); }},
      {R"({"type": "string", "format": "date-time"})",
       [](const json& v) { return v.get<std::string>().size() >= 20 && v.get<std::string>()[10] == 'T'; }},
      {R"({"type": "string", "format": "uuid"})", [](const json& v) { return v.get<std::string>().size() == 36; }},
  };
  const formats::Tokenizer tokenizer = letters();
  for (const Case& some : cases) {
    for (uint32_t seed = 1; seed <= 12; ++seed) {
      const std::string text = written(tokenizer, some.schema, seed);
      const json value = json::parse(text, nullptr, false);
      ASSERT_FALSE(value.is_discarded()) << some.schema << " gave " << text;
      EXPECT_TRUE(some.accepts(value)) << some.schema << " gave " << text;
    }
  }
}

TEST(JsonSchema, RefusesWhatItCannotHold) {
  const auto text = [](const std::string& schema) { return error_text<SchemaError>([&] { grammar_of_schema(schema); }); };
  EXPECT_CONTAINS(text("{"), "isn't JSON");
  EXPECT_CONTAINS(text("3"), "a schema is an object");
  EXPECT_CONTAINS(text("false"), "accepts nothing");
  EXPECT_CONTAINS(text(R"({"type": "strnig"})"), "strnig");
  EXPECT_CONTAINS(text(R"({"type": 3})"), "type must be");
  EXPECT_CONTAINS(text(R"({"type": "string", "pattern": "^a"})"), R"(keyword "pattern")");
  EXPECT_CONTAINS(text(R"({"type": "object", "properties": {"a": {"type": "number", "maximum": 3}}})"), "/properties/a");
  EXPECT_CONTAINS(text(R"({"type": "integer", "minimum": 7})"), "a minimum other than");
  EXPECT_CONTAINS(text(R"({"type": "array", "minItems": 5, "maxItems": 2})"), "maxItems below");
  EXPECT_CONTAINS(text(R"({"type": "array", "minItems": 100000000})"), "minItems must be");
  EXPECT_CONTAINS(text(R"({"type": "array", "minItems": -1})"), "minItems must be");
  EXPECT_CONTAINS(text(R"({"type": "object", "required": ["x"]})"), R"("x")");
  EXPECT_CONTAINS(text(R"({"type": "object", "properties": [], "required": []})"), "properties must be");
  EXPECT_CONTAINS(text(R"({"properties": {"a": true}, "additionalProperties": true})"), "beside properties");
  EXPECT_CONTAINS(text(R"({"enum": []})"), "enum");
  EXPECT_CONTAINS(text(R"({"anyOf": []})"), "anyOf");
  EXPECT_CONTAINS(text(R"({"allOf": [true, true]})"), "allOf");
  EXPECT_CONTAINS(text(R"({"not": {}})"), R"("not")");
  EXPECT_CONTAINS(text(R"({"$ref": "#/nowhere"})"), "leads nowhere");
  EXPECT_CONTAINS(text(R"({"$ref": "#bad"})"), "leads nowhere");
  EXPECT_CONTAINS(text(R"({"$ref": "https://example.com/s"})"), "only places of this document");
  EXPECT_CONTAINS(text(R"({"type": "string", "format": "email"})"), "email");
  std::string deep = "true";
  for (int i = 0; i < 80; ++i) deep = R"({"items": )" + deep + "}";
  EXPECT_CONTAINS(text(deep), "nested deeper");
}

// A schema that is itself and nothing else has no grammar; libllama's refusal is an error, not an end.
TEST(JsonSchema, EndlessReferencesAreRefused) {
  const formats::Tokenizer tokenizer = letters();
  for (const char* schema : {R"({"$ref": "#"})", R"({"anyOf": [{"$ref": "#"}, {"type": "null"}]})"}) {
    SamplingOptions options;
    options.grammar = grammar_of_schema(schema);
    EXPECT_THROW(Sampler(tokenizer.size(), &tokenizer, options), std::invalid_argument) << schema;
  }
}

}  // namespace
}  // namespace latte::runtime
