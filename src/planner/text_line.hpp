#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <vector>

#include "planner/picture.hpp"

namespace dualpipe::detail {

/// Background of a cell; two for each pass, the second for the rank's other stages.
enum class Style : unsigned char { none, forward, forward2, backward, backward2, input, input2, weight, weight2 };

/// @param light  of a rank's other stages than its first.
Style style_of(const Op& op, bool light);

/// One line of characters, each with its style.
class TextLine {
 public:
  TextLine& text(const std::string& characters, Style style = Style::none);
  TextLine& pad_to(std::size_t width, char fill = ' ');
  std::size_t size() const { return characters_.size(); }
  /// Ends in a newline; without color also without trailing spaces.
  std::string str(bool color) const;

 private:
  std::string characters_;
  std::vector<Style> styles_;
};

/// Cut or filled up with spaces.
std::string fitted(std::string text, std::size_t width);

/// Where times are in a line of text.
struct Columns {
  const Picture& picture;
  std::size_t indent = 0;
  double per_time = 1;

  std::size_t operator()(double time) const;
  /// The line above the rows.
  std::string axis(double seconds_per_unit, bool color) const;
};

/// One line per rank in view for the nodes that compute and one for the collectives, all with their names.
std::string lanes_to_ascii(const Timeline& timeline, const Picture& picture, const planner::PictureOptions& options);

/// "--1-----2---": what the marks of a rank say, each where its window begins.
std::string mark_line(const std::vector<planner::Mark>& marks, int rank, const Columns& column);

}  // namespace dualpipe::detail
