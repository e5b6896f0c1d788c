#include "runtime/json_schema.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "formats/error.h"

namespace latte::runtime {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kDeepest = 64;            // of schemas in schemas: a bound of the stack
constexpr size_t kMostRules = 20000;    // libllama walks all of them for each token
constexpr int64_t kMostRepeats = 1000;  // libllama writes them out

// Rules that others build on, each put into the grammar when it is first named.
const std::map<std::string, std::string> kBasics = {
    {"ws", R"(([ ] | "\n" [ ]{0,16})?)"},
    {"char", R"([^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" ([0-9a-cefA-CEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2})))"},
    {"string", R"("\"" char* "\"")"},
    {"digits", R"("0" | [1-9] [0-9]{0,15})"},
    {"integer", R"("-"? digits)"},
    {"number", R"(integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?)"},
    {"boolean", R"("true" | "false")"},
    {"null", R"("null")"},
    {"member", R"(string ws ":" ws value)"},
    {"object", R"("{" ws (member ws ("," ws member ws)*)? "}")"},
    {"array", R"("[" ws (value ws ("," ws value ws)*)? "]")"},
    {"value", R"(object | array | string | number | boolean | null)"},
    {"date", R"([0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01]))"},
    {"time",
     R"(([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,9})? ("Z" | [-+] [01] [0-9] ":" [0-5] [0-9]))"},
    {"date-time", R"(date "T" time)"},
    {"uuid", R"([0-9a-f]{8} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{12})"},
};
const std::map<std::string, std::vector<std::string>> kNeeds = {
    {"string", {"char"}},
    {"integer", {"digits"}},
    {"number", {"integer"}},
    {"member", {"string", "ws", "value"}},
    {"object", {"member", "ws"}},
    {"array", {"value", "ws"}},
    {"date-time", {"date", "time"}},
    {"value", {"object", "array", "string", "number", "boolean", "null"}},
};

const std::set<std::string> kPassedOver = {"title",    "description", "default", "examples", "deprecated",
                                           "readOnly", "writeOnly",   "$schema", "$id",      "$comment",
                                           "$defs",    "definitions", "$anchor"};

// A text as a literal of the grammar.
std::string literal(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else {
      out += c;
    }
  }
  return out + "\"";
}

std::string literal_of(const Json& value) { return literal(value.dump(-1, ' ', false, Json::error_handler_t::replace)); }

class Converter {
 public:
  explicit Converter(const Json& document) : document_(document) {}

  std::string run() {
    const std::string root = rule_of(document_, "", 0);
    std::string grammar = "root ::= " + root + "\n";
    for (const auto& [name, body] : rules_) grammar += name + " ::= " + body + "\n";
    return grammar;
  }

 private:
  [[noreturn]] static void refuse(const std::string& place, const std::string& what) {
    throw SchemaError("JSON schema, " + (place.empty() ? "at its root" : "at " + formats::quote(place)) + ": " + what);
  }

  std::string basic(const std::string& name) {
    if (named_.insert(name).second) {
      rules_.emplace_back(name, kBasics.at(name));
      if (const auto needs = kNeeds.find(name); needs != kNeeds.end()) {
        for (const std::string& other : needs->second) basic(other);
      }
    }
    return name;
  }

  std::string add(const std::string& body, const std::string& place) {
    if (rules_.size() >= kMostRules) refuse(place, "too large a schema");
    rules_.emplace_back("r" + std::to_string(made_++), body);
    return rules_.back().first;
  }

  // The name of a rule that stands for a schema.
  std::string rule_of(const Json& schema, const std::string& place, int depth) {
    if (depth > kDeepest) refuse(place, "nested deeper than " + std::to_string(kDeepest));
    if (schema.is_boolean()) {
      if (!schema.get<bool>()) refuse(place, "false accepts nothing");
      return basic("value");
    }
    if (!schema.is_object()) refuse(place, std::string("a schema is an object or true, not a ") + schema.type_name());
    if (schema.contains("$ref")) return reference(schema, place, depth);
    for (const char* key : {"anyOf", "oneOf"}) {
      if (schema.contains(key)) return alternatives(schema, key, place, depth);
    }
    if (schema.contains("allOf")) {
      const Json& all = schema.at("allOf");
      if (!all.is_array() || all.size() != 1) refuse(place, "allOf of several schemas isn't known here");
      allow(schema, {"allOf", "type"}, place);
      return rule_of(all.at(0), place + "/allOf/0", depth + 1);
    }
    if (schema.contains("const")) {
      allow(schema, {"const", "type"}, place);
      return add(literal_of(schema.at("const")), place);
    }
    if (schema.contains("enum")) {
      allow(schema, {"enum", "type"}, place);
      const Json& values = schema.at("enum");
      if (!values.is_array() || values.empty()) refuse(place, "enum must be a list of at least one value");
      std::string body;
      for (const Json& value : values) body += (body.empty() ? "" : " | ") + literal_of(value);
      return add(body, place);
    }
    return by_type(schema, place, depth);
  }

  std::string by_type(const Json& schema, const std::string& place, int depth) {
    std::vector<std::string> types;
    if (!schema.contains("type")) {
      // Keywords say what is meant.
      const auto has = [&](std::initializer_list<const char*> keys) {
        return std::any_of(keys.begin(), keys.end(), [&](const char* key) { return schema.contains(key); });
      };
      if (has({"properties", "required", "additionalProperties"})) {
        types = {"object"};
      } else if (has({"items", "prefixItems", "minItems", "maxItems"})) {
        types = {"array"};
      } else if (has({"minLength", "maxLength", "format"})) {
        types = {"string"};
      } else {
        allow(schema, {}, place);
        return basic("value");
      }
    } else if (schema.at("type").is_string()) {
      types = {schema.at("type").get<std::string>()};
    } else if (schema.at("type").is_array() && !schema.at("type").empty()) {
      for (const Json& type : schema.at("type")) {
        if (!type.is_string()) refuse(place, "type must be a name or a list of names");
        types.push_back(type.get<std::string>());
      }
    } else {
      refuse(place, "type must be a name or a list of names");
    }
    std::set<std::string> known = {"type"};
    for (const std::string& type : types) {
      if (type == "object") known.insert({"properties", "required", "additionalProperties"});
      if (type == "array") known.insert({"items", "prefixItems", "minItems", "maxItems"});
      if (type == "string") known.insert({"minLength", "maxLength", "format"});
      if (type == "integer") known.insert("minimum");
    }
    allow(schema, known, place);
    std::string body;
    for (const std::string& type : types) body += (body.empty() ? "" : " | ") + of_type(type, schema, place, depth);
    return types.size() == 1 ? body : add(body, place);
  }

  std::string of_type(const std::string& type, const Json& schema, const std::string& place, int depth) {
    if (type == "object") return object(schema, place, depth);
    if (type == "array") return array(schema, place, depth);
    if (type == "string") return text(schema, place);
    if (type == "number" || type == "boolean" || type == "null") return basic(type);
    if (type == "integer") {
      if (!schema.contains("minimum")) return basic("integer");
      const Json& minimum = schema.at("minimum");
      if (minimum == 0) return basic("digits");
      if (minimum == 1) return add("[1-9] [0-9]{0,15}", place);
      refuse(place, "a minimum other than 0 and 1 isn't known here");
    }
    refuse(place, "type " + formats::quote(type) + " isn't one");
  }

  std::string text(const Json& schema, const std::string& place) {
    const auto [least, most] = range(schema, "minLength", "maxLength", place);
    if (schema.contains("format")) {
      const Json& format = schema.at("format");
      const std::string name = format.is_string() ? format.get<std::string>() : "";
      if (name != "date" && name != "time" && name != "date-time" && name != "uuid") {
        refuse(place, "format " + formats::quote(format.dump()) + " isn't known here");
      }
      if (least > 0 || most) refuse(place, "a format together with a length isn't known here");
      return add(R"("\"" )" + basic(name) + R"( "\"")", place);
    }
    if (least == 0 && !most) return basic("string");
    return add(R"("\"" )" + basic("char") + repeats(least, most) + R"( "\"")", place);
  }

  std::string array(const Json& schema, const std::string& place, int depth) {
    auto [least, most] = range(schema, "minItems", "maxItems", place);
    const std::string ws = basic("ws");
    std::string first;  // items that have their own schema
    int64_t fixed = 0;
    if (schema.contains("prefixItems")) {
      const Json& items = schema.at("prefixItems");
      if (!items.is_array()) refuse(place, "prefixItems must be a list of schemas");
      for (const Json& item : items) {
        const std::string at = place + "/prefixItems/" + std::to_string(fixed);
        first += (fixed == 0 ? "" : R"("," )" + ws + " ") + rule_of(item, at, depth + 1) + " " + ws + " ";
        ++fixed;
      }
      if (most && *most < fixed) refuse(place, "maxItems below the count of prefixItems");
      least = std::max<int64_t>(0, least - fixed);
      if (most) *most -= fixed;
    }
    const bool closed = schema.contains("items") && schema.at("items").is_boolean() && !schema.at("items").get<bool>();
    if (closed || (most && *most == 0)) {
      if (least > 0) refuse(place, "minItems above the count of items there can be");
      return add(R"("[" )" + ws + " " + first + R"("]")", place);
    }
    const std::string item = schema.contains("items") ? rule_of(schema.at("items"), place + "/items", depth + 1) : basic("value");
    const std::string next = add(R"("," )" + ws + " " + item + " " + ws, place);
    std::string body;
    if (fixed > 0) {
      body = first + next + repeats(least, most);
    } else {
      const std::optional<int64_t> more = most ? std::optional(*most - 1) : std::nullopt;
      body = item + " " + ws + " " + next + repeats(std::max<int64_t>(0, least - 1), more);
      if (least == 0) body = "(" + body + ")?";
    }
    return add(R"("[" )" + ws + " " + body + R"( "]")", place);
  }

  std::string object(const Json& schema, const std::string& place, int depth) {
    const std::string ws = basic("ws");
    const Json none = Json::object();
    const Json& properties = schema.contains("properties") ? schema.at("properties") : none;
    if (!properties.is_object()) refuse(place, "properties must be an object");
    std::set<std::string> required;
    if (schema.contains("required")) {
      if (!schema.at("required").is_array()) refuse(place, "required must be a list of names");
      for (const Json& name : schema.at("required")) {
        if (!name.is_string()) refuse(place, "required must be a list of names");
        required.insert(name.get<std::string>());
        if (!properties.contains(name.get<std::string>())) {
          refuse(place, "required names " + formats::quote(name.get<std::string>()) + ", which properties doesn't");
        }
      }
    }
    std::string others;  // a member that properties doesn't name
    if (schema.contains("additionalProperties")) {
      const Json& more = schema.at("additionalProperties");
      if (!more.is_boolean() || more.get<bool>()) {
        // A key that is one of the named ones would come twice, and JSON's readers differ in what they do then.
        if (!properties.empty()) refuse(place, "additionalProperties beside properties isn't known here, but for false");
        others = more.is_boolean() ? basic("member")
                                   : add(basic("string") + " " + ws + R"( ":" )" + ws + " " +
                                             rule_of(more, place + "/additionalProperties", depth + 1),
                                         place);
      }
    } else if (properties.empty()) {
      others = basic("member");
    }
    if (!others.empty()) {
      const std::string next = add(R"("," )" + ws + " " + others + " " + ws, place);
      return add(R"("{" )" + ws + " (" + others + " " + ws + " " + next + R"(*)? "}")", place);
    }
    // From the last to the first: what may follow, where nothing came before (alone) and where something did (behind).
    std::string alone, behind;
    std::vector<std::pair<std::string, const Json*>> members;
    for (const auto& [name, value] : properties.items()) members.emplace_back(name, &value);
    for (auto member = members.rbegin(); member != members.rend(); ++member) {
      const std::string& name = member->first;
      const std::string at = place + "/properties/" + name;
      const std::string pair = add(
          literal_of(Json(name)) + " " + ws + R"( ":" )" + ws + " " + rule_of(*member->second, at, depth + 1) + " " + ws, place);
      const std::string now = pair + (behind.empty() ? "" : " " + behind);
      const std::string later = R"("," )" + ws + " " + now;
      const bool optional = !required.contains(name);
      const std::string next_alone = optional ? now + " | " + (alone.empty() ? R"("")" : alone) : now;
      const std::string next_behind = optional ? later + " | " + (behind.empty() ? R"("")" : behind) : later;
      alone = add(next_alone, place);
      behind = add(next_behind, place);
    }
    return add(R"("{" )" + ws + " " + (alone.empty() ? "" : alone + " ") + R"("}")", place);
  }

  std::string alternatives(const Json& schema, const char* key, const std::string& place, int depth) {
    allow(schema, {key, "type", "discriminator"}, place);
    const Json& list = schema.at(key);
    if (!list.is_array() || list.empty()) refuse(place, std::string(key) + " must be a list of at least one schema");
    std::string body;
    for (size_t i = 0; i < list.size(); ++i) {
      body += (i == 0 ? "" : " | ") + rule_of(list[i], place + "/" + key + "/" + std::to_string(i), depth + 1);
    }
    return add(body, place);
  }

  std::string reference(const Json& schema, const std::string& place, int depth) {
    allow(schema, {"$ref"}, place);
    const Json& ref = schema.at("$ref");
    const std::string target = ref.is_string() ? ref.get<std::string>() : "";
    if (!target.starts_with("#")) refuse(place, "$ref " + formats::quote(ref.dump()) + ": only places of this document are read");
    if (const auto known = references_.find(target); known != references_.end()) return known->second;
    const Json* found = nullptr;
    try {
      found = &document_.at(Json::json_pointer(target.substr(1)));
    } catch (const nlohmann::json::exception&) {
      refuse(place, "$ref " + formats::quote(target) + " leads nowhere");
    }
    // Named before it is made: it may contain itself.
    std::string name = "ref" + std::to_string(references_.size());
    references_.emplace(target, name);
    const std::string body = rule_of(*found, target.substr(1), depth + 1);
    rules_.emplace_back(name, body);
    return name;
  }

  // Throws for a keyword that isn't known in this place.
  static void allow(const Json& schema, const std::set<std::string>& known, const std::string& place) {
    for (const auto& [key, value] : schema.items()) {
      if (!known.contains(key) && !kPassedOver.contains(key))
        refuse(place, "keyword " + formats::quote(key) + " isn't known here");
    }
  }

  static int64_t count(const Json& value, const char* key, const std::string& place) {
    if (!value.is_number_integer() || value < 0 || value > kMostRepeats) {
      refuse(place, std::string(key) + " must be a number of 0 to " + std::to_string(kMostRepeats));
    }
    return value.get<int64_t>();
  }

  static std::pair<int64_t, std::optional<int64_t>> range(const Json& schema, const char* least_key, const char* most_key,
                                                          const std::string& place) {
    const int64_t least = schema.contains(least_key) ? count(schema.at(least_key), least_key, place) : 0;
    std::optional<int64_t> most;
    if (schema.contains(most_key)) most = count(schema.at(most_key), most_key, place);
    if (most && *most < least) refuse(place, std::string(most_key) + " below " + least_key);
    return {least, most};
  }

  static std::string repeats(int64_t least, const std::optional<int64_t>& most) {
    if (least == 0 && !most) return "*";
    if (most) return "{" + std::to_string(least) + "," + std::to_string(*most) + "}";
    return "{" + std::to_string(least) + ",}";
  }

  const Json& document_;
  std::vector<std::pair<std::string, std::string>> rules_;
  std::set<std::string> named_;
  std::map<std::string, std::string> references_;
  size_t made_ = 0;
};

}  // namespace

std::string grammar_of_schema(std::string_view schema) {
  const Json document = Json::parse(schema, nullptr, /*allow_exceptions=*/false);
  if (document.is_discarded()) throw SchemaError("JSON schema: the text isn't JSON");
  return Converter(document).run();
}

}  // namespace latte::runtime
