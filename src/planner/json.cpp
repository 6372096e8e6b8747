#include "planner/json.hpp"

#include <algorithm>
#include <cstddef>
#include <set>
#include <string>
#include <vector>

#include "dualpipe/error.hpp"

namespace dualpipe::detail {
namespace {

using nlohmann::json;

std::string cut(const std::string& text, std::size_t length) {
  return text.size() <= length ? text : text.substr(0, length) + "...";
}

/// Checks a text before it becomes a tree. The library's parser callback could do it too, but is quadratic in the
/// number of objects in an array.
class Survey final : public nlohmann::json_sax<json> {
 public:
  Survey(std::string_view text, Keys keys) : text_(text), keys_(keys) {}

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_array(std::size_t) override { return enter(); }
  bool end_array() override { return leave(); }
  bool start_object(std::size_t) override { return enter(); }
  bool end_object() override { return leave(); }

  bool key(string_t& name) override {
    if (keys_ == Keys::unique)
      DUALPIPE_CHECK(named_.back().insert(name).second, "the key ", brief(name), " is named twice");
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const json::exception& error) override {
    // The message begins with a code in brackets and ends with the token, which may be long. For a number out of range
    // it lacks the place.
    constexpr std::size_t max_shown = 240;
    std::string message = error.what();
    message.erase(0, message.find("] ") + 2);
    if (message.find("at line") == std::string::npos) message = place_of(position) + message;
    throw InvalidArgument("not JSON: " + cut(message, max_shown));
  }

 private:
  bool enter() {
    DUALPIPE_CHECK(named_.size() < max_json_depth, "JSON that is nested deeper than ", max_json_depth, " levels");
    named_.emplace_back();
    return true;
  }

  bool leave() {
    named_.pop_back();
    return true;
  }

  std::string place_of(std::size_t position) const {
    const std::string_view before = text_.substr(0, position);
    const auto lines = std::count(before.begin(), before.end(), '\n');
    return str("line ", lines + 1, ", column ", before.size() - (before.rfind('\n') + 1), ": ");
  }

  std::string_view text_;
  Keys keys_;
  std::vector<std::set<std::string>> named_;  // keys of each open object; arrays have none
};

}  // namespace

json parse_json(std::string_view text, Keys keys) {
  Survey survey(text, keys);
  json::sax_parse(text, &survey);
  return json::parse(text);
}

std::string brief(const json& value) {
  constexpr std::size_t max_shown = 80;
  return cut(value.dump(-1, ' ', true), max_shown);
}

}  // namespace dualpipe::detail
