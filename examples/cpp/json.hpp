// Reads JSON as far as a manifest needs it: no \u escapes. LibTorch brings no reader of its own.
#pragma once

#include <cctype>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  enum class Kind { null, boolean, number, text, list, object } kind = Kind::null;
  double number = 0;  // also 0 or 1 for a boolean
  std::string text;
  std::vector<Json> list;
  std::map<std::string, Json> object;

  const Json& at(const std::string& key) const {
    auto found = object.find(key);
    if (found == object.end()) throw std::runtime_error("the manifest has no field '" + key + "'");
    return found->second;
  }
};

class JsonReader {
 public:
  explicit JsonReader(std::string text) : text_(std::move(text)) {}

  Json read() {
    Json value = read_value();
    if (peek() != '\0') fail();
    return value;
  }

 private:
  char peek() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  [[noreturn]] void fail() const {
    throw std::runtime_error("the manifest is no JSON from character " + std::to_string(at_) + " on");
  }

  void expect(const std::string& word) {
    if (peek() != word[0] || text_.compare(at_, word.size(), word) != 0) fail();
    at_ += word.size();
  }

  bool next_is(char wanted) {
    if (peek() != wanted) return false;
    ++at_;
    return true;
  }

  Json read_value() {
    Json value;
    switch (peek()) {
      case '{':
        value.kind = Json::Kind::object;
        expect("{");
        while (!next_is('}')) {
          if (!value.object.empty()) expect(",");
          std::string key = read_text();
          expect(":");
          value.object[key] = read_value();
        }
        return value;
      case '[':
        value.kind = Json::Kind::list;
        expect("[");
        while (!next_is(']')) {
          if (!value.list.empty()) expect(",");
          value.list.push_back(read_value());
        }
        return value;
      case '"':
        value.kind = Json::Kind::text;
        value.text = read_text();
        return value;
      case 'n':
        expect("null");
        return value;
      case 't':
      case 'f':
        value.kind = Json::Kind::boolean;
        value.number = peek() == 't';
        expect(value.number != 0 ? "true" : "false");
        return value;
      default:
        return read_number();
    }
  }

  Json read_number() {
    char* end = nullptr;
    Json value;
    value.kind = Json::Kind::number;
    value.number = std::strtod(text_.c_str() + at_, &end);
    if (end == text_.c_str() + at_) fail();
    at_ = static_cast<size_t>(end - text_.c_str());
    return value;
  }

  std::string read_text() {
    expect("\"");
    std::string read;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] == '\\') ++at_;
      if (at_ < text_.size()) read += text_[at_++];
    }
    expect("\"");
    return read;
  }

  std::string text_;
  size_t at_ = 0;
};
