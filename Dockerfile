# docker build -t sgld . && docker run --rm -p 30010:30010 -e SGLANG_API_KEY="$KEY" sgld
FROM python:3.11-slim
WORKDIR /opt/sgld
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY sgld sgld
RUN pip install --no-cache-dir -c constraints.txt .
RUN useradd --create-home sgld
USER sgld
WORKDIR /home/sgld
EXPOSE 30010
ENTRYPOINT ["sgld"]
CMD ["serve", "--host", "0.0.0.0"]
