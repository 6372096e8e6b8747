#include "planner/json.hpp"

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

/// Refuses what the tree would not show or not bear. The library's parser callback could do it too, but is quadratic in
/// the number of objects in an array.
class Survey final : public nlohmann::json_sax<json> {
 public:
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
    DUALPIPE_CHECK(named_.back().insert(name).second, "the key ", brief(name), " is named twice");
    return true;
  }

  bool parse_error(std::size_t, const std::string&, const json::exception& error) override {
    // It begins with a code in brackets and ends with the token, which may be long.
    const std::string message = error.what();
    throw InvalidArgument("not JSON: " + cut(message.substr(message.find("] ") + 2), 240));
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

  std::vector<std::set<std::string>> named_;  // keys of each open object; arrays have none
};

}  // namespace

json parse_json(std::string_view text) {
  Survey survey;
  json::sax_parse(text, &survey);
  return json::parse(text);
}

std::string brief(const json& value) { return cut(value.dump(-1, ' ', true), 80); }

}  // namespace dualpipe::detail
