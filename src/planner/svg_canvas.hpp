#pragma once

#include <string>
#include <utility>
#include <vector>

#include "dualpipe/schedule/op.hpp"

namespace dualpipe::detail {

// Of text, in pixels.
constexpr double digit_width = 5.6, font_size = 9.5;
constexpr const char* centred = " text-anchor=\"middle\"";

/// Fill of a pass: dark for a rank's first stage, light for its others.
const char* fill_of(Pass pass, bool light);

/// Elements of an SVG file, in the order in which they are drawn. Lengths are pixels; `more` holds attributes, each
/// with a space before it.
class Canvas {
 public:
  void rect(double x, double y, double width, double height, const char* fill, const char* more = "");
  void text(double x, double y, const std::string& text, const char* more = "");
  /// From point to point.
  void polyline(const std::vector<std::pair<double, double>>& points, const char* stroke);
  void line(double x1, double y1, double x2, double y2, const char* stroke);
  /// What is drawn until close() shows `title` under the mouse.
  void open(const std::string& title);
  void close();

  std::string document(double width, double height) const;

 private:
  std::string body_;
};

}  // namespace dualpipe::detail
