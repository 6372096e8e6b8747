#include "planner/svg_canvas.hpp"

#include <cstdio>

namespace dualpipe::detail {
namespace {

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '"')
      out += "&quot;";
    else if (static_cast<unsigned char>(c) >= 0x20)
      out += c;
  }
  return out;
}

/// A length or position to a hundredth of a pixel.
std::string px(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f", value);
  std::string out = text;
  out.erase(out.find_last_not_of('0') + 1);
  if (out.back() == '.') out.pop_back();
  return out;
}

}  // namespace

const char* fill_of(Pass pass, bool light) {
  switch (pass) {
    case Pass::Forward:
      return light ? "#a9cdf0" : "#5b9bd8";
    case Pass::Backward:
      return light ? "#b5e0b0" : "#63b55f";
    case Pass::BackwardInput:
      return light ? "#a5e3df" : "#3fb3ad";
    case Pass::BackwardWeight:
      break;
  }
  return light ? "#f6e0a0" : "#e2b13c";
}

void Canvas::rect(double x, double y, double width, double height, const char* fill, const char* more) {
  body_ += "<rect x=\"" + px(x) + "\" y=\"" + px(y) + "\" width=\"" + px(width) + "\" height=\"" + px(height) +
           "\" fill=\"" + fill + "\"" + more + "/>\n";
}

void Canvas::text(double x, double y, const std::string& text, const char* more) {
  body_ += "<text x=\"" + px(x) + "\" y=\"" + px(y) + "\"" + more + ">" + escaped(text) + "</text>\n";
}

void Canvas::line(double x1, double y1, double x2, double y2, const char* stroke) {
  body_ += "<path d=\"M" + px(x1) + " " + px(y1) + "L" + px(x2) + " " + px(y2) + "\" stroke=\"" + stroke + "\"/>\n";
}

void Canvas::polyline(const std::vector<std::pair<double, double>>& points, const char* stroke) {
  body_ += "<polyline points=\"";
  for (const auto& [x, y] : points) body_ += px(x) + "," + px(y) + " ";
  body_ += "\" fill=\"none\" stroke=\"" + std::string(stroke) + "\" stroke-width=\"1.2\" stroke-linejoin=\"round\"/>\n";
}

void Canvas::open(const std::string& title) { body_ += "<g><title>" + escaped(title) + "</title>\n"; }
void Canvas::close() { body_ += "</g>\n"; }

std::string Canvas::document(double width, double height) const {
  return "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" + px(width) + "\" height=\"" + px(height) +
         "\" viewBox=\"0 0 " + px(width) + " " + px(height) +
         "\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"" + px(font_size) +
         "\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n" + body_ + "</svg>\n";
}

}  // namespace dualpipe::detail
