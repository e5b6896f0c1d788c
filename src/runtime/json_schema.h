// JSON schemas as grammars: what a model writes under one is JSON that the schema accepts.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace latte::runtime {

// A schema that isn't one, or asks for what a grammar can't hold or this converter doesn't know. The text names the place, as a
// JSON pointer, and what was found there.
class SchemaError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// `schema` is JSON text; the result is GBNF with the rule "root". Known: type (one or several), properties, required,
// additionalProperties, items, prefixItems, minItems, maxItems, minLength, maxLength, enum, const, anyOf, oneOf (as anyOf), allOf
// of one, $ref within the document, minimum 0 or 1 of integers, and the formats date, time, date-time and uuid of strings.
// Titles, descriptions, defaults and the like are passed over; any other keyword is an error, since what was written could break
// it.
//
// The grammar is narrower than the schema where that does no harm: properties come in the schema's order, none that it doesn't
// name unless additionalProperties says so, and numbers have at most 16 digits.
std::string grammar_of_schema(std::string_view schema);

}  // namespace latte::runtime
