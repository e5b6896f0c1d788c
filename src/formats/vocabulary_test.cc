#include "formats/vocabulary.h"

#include "formats/test_files.h"
#include "formats/utf8.h"

namespace latte::formats {
namespace {

TEST(Utf8, EveryCodePointRoundTrips) {
  for (char32_t value = 0; value < kCodePoints; ++value) {
    std::string text;
    append_utf8(text, value);
    const CodePoint point = decode_utf8(text, 0);
    if (value >= 0xD800 && value < 0xE000) {
      ASSERT_EQ(point.length, 0) << "surrogate " << static_cast<uint32_t>(value);
      continue;
    }
    ASSERT_EQ(point.length, static_cast<int>(text.size()));
    ASSERT_EQ(point.value, value);
    if (text.size() > 1) ASSERT_EQ(decode_utf8(std::string_view(text).substr(0, text.size() - 1), 0).length, 0);
  }
}

TEST(Utf8, RefusesWhatIsInvalid) {
  for (const char* text :
       {"\x80", "\xbf", "\xc0\x80", "\xc1\xbf", "\xc3", "\xc3(", "\xe0\x80\x80", "\xe0\x9f\xbf", "\xe2\x82", "\xed\xa0\x80",
        "\xf0\x80\x80\x80", "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff"}) {
    EXPECT_EQ(decode_utf8(text, 0).length, 0) << text;
  }
}

TEST(Vocabulary, Bytes) {
  const Vocabulary vocabulary = Vocabulary::bytes();
  EXPECT_EQ(vocabulary.size(), 256);
  const std::string text = std::string("any\0 \xff", 6);
  EXPECT_EQ(vocabulary.encode(text), (std::vector<int64_t>{'a', 'n', 'y', 0, ' ', 255}));
  EXPECT_EQ(vocabulary.decode(vocabulary.encode(text)), text);
  EXPECT_EQ(Vocabulary::from_description(vocabulary.description()), vocabulary);
}

TEST(Vocabulary, CharactersByCodePoint) {
  const std::string text = "bé😀ab\n";
  const Vocabulary vocabulary = Vocabulary::characters_of(text);
  EXPECT_EQ(vocabulary.size(), 5);
  EXPECT_EQ(vocabulary.encode(text), (std::vector<int64_t>{2, 3, 4, 1, 2, 0}));
  EXPECT_EQ(vocabulary.decode(vocabulary.encode(text)), text);
  EXPECT_EQ(vocabulary.description(), "characters:\nabé😀");
  EXPECT_EQ(Vocabulary::from_description(vocabulary.description()), vocabulary);
  EXPECT_FALSE(Vocabulary::characters_of("abc") == vocabulary);
  EXPECT_FALSE(Vocabulary::bytes() == vocabulary);
}

TEST(Vocabulary, NamesWhatItDoesNotHave) {
  const Vocabulary vocabulary = Vocabulary::characters_of("abcü");
  EXPECT_EQ(error_text<TokenError>([&] { vocabulary.encode("abé"); }),
            "invalid token: the character \"é\" (U+00E9) at byte 2 is none of the vocabulary's 4");
  EXPECT_EQ(error_text<TokenError>([&] { vocabulary.encode("ab\n"); }),
            "invalid token: the character \"\\x0a\" (U+000A) at byte 2 is none of the vocabulary's 4");
  EXPECT_EQ(error_text<TokenError>([&] { vocabulary.encode("a\xe9z"); }),
            "invalid UTF-8 at byte 1: \"\\xe9\" begins no character; a vocabulary of bytes takes any text");
  EXPECT_CONTAINS(error_text<TokenError>([] { Vocabulary::characters_of("ab\xc3"); }), "invalid UTF-8 at byte 2");
  const std::vector<int64_t> beyond = {0, 4}, negative = {-1};
  EXPECT_EQ(error_text<TokenError>([&] { vocabulary.decode(beyond); }), "invalid token 4: expected 0 to 3");
  EXPECT_EQ(error_text<TokenError>([&] { Vocabulary::bytes().decode(negative); }), "invalid token -1: expected 0 to 255");
}

TEST(Vocabulary, RefusesOtherDescriptions) {
  for (const char* text : {"", "byte", "characters", "characters:", "characters:ba", "characters:aab", "characters:\xff"}) {
    EXPECT_THROW(Vocabulary::from_description(text), std::invalid_argument) << text;
  }
}

}  // namespace
}  // namespace latte::formats
